"""Local stand-ins for Upstox and the database servers."""
