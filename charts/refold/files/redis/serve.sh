#!/bin/sh
# Starts the server with the users that it had and the operator's, whose password is the chart's. Arguments: redis.conf,
# and settings that go over it.
set -eu
umask 077

# After a forced deletion the former pod may still run, and two servers on one folder would spoil each other's file.
exec 9>"$REFOLD_REDIS_DATA/lock"
flock 9

users=$REFOLD_REDIS_DATA/users.acl
hash=$(printf %s "$REFOLD_ADMIN_PASSWORD" | sha256sum | cut -d ' ' -f 1)
unset REFOLD_ADMIN_PASSWORD
{
  # Nobody logs in as this one, but Redis reads its append-only file with its rights: without them it would leave out every
  # script that wrote more than once.
  echo "user default off resetpass ~* resetchannels +@all"
  # Asks whether the server runs.
  echo "user probe on nopass resetkeys resetchannels -@all +ping"
  # The operator: read models, their users, and nothing of the server.
  echo "user refold_admin on #$hash ~refold:* resetchannels -@all +@hash +@sortedset +@string +@connection -@admin -@dangerous" \
    "+exists +del +unlink +time +eval +evalsha +info +acl|setuser +acl|getuser +acl|deluser +acl|save"
  # Of a save that broke off there is another file, which Redis doesn't read.
  [ ! -f "$users" ] || sed -e '/^user default /d' -e '/^user probe /d' -e '/^user refold_admin /d' "$users"
} >"$users.new"
mv "$users.new" "$users"
rm -f "$users".tmp-*
sync

exec redis-server "$@" --dir "$REFOLD_REDIS_DATA" --aclfile "$users"
