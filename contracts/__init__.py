"""What stages hand to each other: records, the store, the draft, the recipe, the ledger, errors."""
