"""How to connect to PostgreSQL: where it is, which server of several, what a connection pins, what errors may say."""
