"""File formats that stages exchange: conversation, hidden-state store, draft, ledger, run, other tools' layouts."""
