"""A decoder that changes nothing and notes what the loop shows it."""
