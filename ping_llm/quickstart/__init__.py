"""The whole story once: simulate an internet, learn it, predict it, and read what was learnt."""
