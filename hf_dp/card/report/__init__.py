"""A model's folder and the results of verification -> one HTML page: what was trained, claimed and checked."""
