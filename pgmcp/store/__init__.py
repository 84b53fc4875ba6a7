"""Everything that speaks SQL: one module per table group, named statements in ``sql/``.

The modules of this folder, and ``encryption``, are the running node's. ``connection``, ``schema`` and ``commands`` know
nothing of them.
"""
