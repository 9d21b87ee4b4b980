"""A model's folder and what verification found in it -> one HTML page that says what was trained, claimed and checked."""
