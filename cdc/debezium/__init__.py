"""Portable events: row changes in Debezium's format, out and in. Bytes to bytes, without any I/O.

https://debezium.io/documentation/reference/stable/connectors/postgresql.html
"""
