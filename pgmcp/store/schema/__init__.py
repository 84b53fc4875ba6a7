"""The schema: its tables and public views, which revisions this build knows, and the migrations between them."""
