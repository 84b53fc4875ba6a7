"""Who lives, who owns, who is woken: pure logic on ports, with time from outside."""
