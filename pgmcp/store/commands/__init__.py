"""What commands ask and change in the database, each on one short-lived connection, outside any event loop."""
