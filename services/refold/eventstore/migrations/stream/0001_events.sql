-- The events of one stream. Run in the stream's schema's transaction as the owner role.


create table :"schema".events (
  partition   integer not null,
  position    bigint not null check (position > 0),
  subject     text collate "C" not null check (octet_length(subject) between 1 and 512),
  revision    bigint not null check (revision > 0),
  id          text collate "C" not null check (octet_length(id) between 1 and 255),
  type        text collate "C" not null check (octet_length(type) between 1 and 255),
  data        jsonb not null,
  metadata    jsonb,
  recorded_at timestamptz not null,
  primary key (partition, position),
  unique (partition, subject, revision),
  unique (partition, subject, id)
) partition by list (partition);

create trigger append_only before update or delete or truncate on :"schema".events
  for each statement execute function refold.refuse_change();
alter table :"schema".events enable always trigger append_only;

-- A statement that names a partition fires only that partition's statement triggers, so each has its own.
do $do$
begin
  for p in 0 .. :partitions - 1 loop
    execute format('create table %1$I.%2$I partition of %1$I.events for values in (%3$s)', :'schema', 'events_' || p, p);
    execute format('create trigger append_only before update or delete or truncate on %I.%I '
      'for each statement execute function refold.refuse_change()', :'schema', 'events_' || p);
    execute format('alter table %I.%I enable always trigger append_only', :'schema', 'events_' || p);
  end loop;
end
$do$;

grant usage on schema :"schema" to :"writer", :"reader", :"eventstore", :"relay";
grant select on :"schema".events to :"reader", :"eventstore", :"relay";
