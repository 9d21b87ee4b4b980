"""Nothing goes in; a private and a plain run on made-up records come out, compared."""
