"""How private a run was, measured: canaries' scores -> a lower bound on epsilon that holds with a stated confidence."""
