"""A recipe and a grid of settings -> the best of a random number of trainings, with the epsilon of the choice on its card."""
