#!/bin/bash
# Starts the server on the prepared data folder. PostgreSQL's own guard against a second server on the same folder compares
# process ids, which mean nothing between containers: after a forced deletion the former pod may still run. So the lock.
set -euo pipefail

exec 9>"$PGDATA.lock"
flock 9
exec postgres -D "$PGDATA" -c config_file=/etc/refold/postgresql.conf -c hba_file=/etc/refold/pg_hba.conf
