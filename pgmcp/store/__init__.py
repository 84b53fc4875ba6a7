"""Everything that speaks SQL: one module per table group, named statements in ``sql/``, line and migrations."""
