"""gunicorn with prefork: the app and its store are made once, and then the workers are forked."""

workers = 3
threads = 4
# This is safe, because a store opens new connections in each forked child. Do not read a token before the fork: each
# worker would then hold it, and the audit trail would show one reader in place of three.
preload_app = True
# A request may wait for another worker's login, by default for 60 s. A shorter timeout would kill the one that logs in.
timeout = 90
