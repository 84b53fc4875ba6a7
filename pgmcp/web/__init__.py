"""HTTP: any node terminates any exchange of any session."""
