"""``python -m benchmarks`` runs every measurement; ``python -m benchmarks.NAME --help`` tells of one."""

from benchmarks import kafka, logical

if __name__ == "__main__":
    logical.main()
    kafka.main()
