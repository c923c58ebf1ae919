#!/bin/bash
# Makes the data folder and brings roles, passwords and databases to what the chart says; the server itself starts after it.
# Safe to repeat, and after any crash: the folder is made under another name and renamed once it is whole.
# The superuser has no password: it is the user of this container, over the socket.
set -euo pipefail

# A former pod may still run after a forced deletion.
exec 9>"$PGDATA.lock"
flock 9

if [ ! -f "$PGDATA/PG_VERSION" ]; then
  rm -rf "$PGDATA.new"
  initdb --pgdata="$PGDATA.new" --username=postgres --auth-local=peer --auth-host=scram-sha-256 \
    --encoding=UTF8 --locale=C.UTF-8 --data-checksums
  mv "$PGDATA.new" "$PGDATA"
  sync
fi

# A volume shared by group (fsGroup) may have opened the folder; PostgreSQL refuses that.
chmod 0700 "$PGDATA"

# Without TCP: nobody is served yet. A crash is recovered from here, so the start may take its time.
pg_ctl start --pgdata="$PGDATA" --wait --timeout=600 \
  --options="-c config_file=/etc/refold/postgresql.conf -c hba_file=/etc/refold/pg_hba.conf -c listen_addresses=''"
psql --no-psqlrc --quiet --username=postgres --dbname=postgres --set=ON_ERROR_STOP=1 --file=/etc/refold/setup.sql
pg_ctl stop --pgdata="$PGDATA" --mode=fast --wait --timeout=600
