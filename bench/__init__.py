"""What a served draft is worth."""
