"""The measurements that the documentation quotes, each runnable by one command."""
