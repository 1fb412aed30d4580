"""PostgreSQL 15 to 18 as a leader and as a follower: connecting, describing, checking, setting up, seeing."""
