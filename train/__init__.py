"""Hidden states to a draft; its offline evaluation; its export."""
