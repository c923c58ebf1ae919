#!/bin/bash
# Formats the storage where it isn't yet; the broker itself starts after it. Safe to repeat: the cluster's id is chosen
# once and kept beside the data, so a format that was broken off is finished with the same id.
set -euo pipefail

id_file=$REFOLD_KAFKA_DATA/cluster-id
done_file=$REFOLD_KAFKA_DATA/formatted
[ ! -e "$done_file" ] || exit 0
if [ ! -s "$id_file" ]; then
  # As Kafka's random-uuid: 16 bytes in base64url, not beginning with a dash.
  head -c 16 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=' | sed 's/^-/A/' >"$id_file.new"
  mv "$id_file.new" "$id_file"
  sync
fi
# shellcheck disable=SC2086  # several options
java $REFOLD_JAVA_OPTIONS -cp '/opt/kafka/libs/*' kafka.tools.StorageTool format --ignore-formatted \
  --cluster-id "$(cat "$id_file")" --config /etc/refold/server.properties
touch "$done_file"
sync
