"""The paper's claims, one command each."""
