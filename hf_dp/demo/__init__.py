"""The embedded default: made-up customer records, a small model, and a run with and without privacy."""
