"""The code that all patterns share: the life cycle of a token, logins, encryption, errors."""
