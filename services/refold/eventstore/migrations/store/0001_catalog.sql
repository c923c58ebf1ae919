-- The catalog of a store: which streams stand in it, and the heads of their partitions.
-- Run by refold.eventstore.catalog as the owner role.

create table refold.store (
  id text not null check (id ~ '^[0-9a-f]{16}$')
);
create unique index store_one_row on refold.store ((true));
insert into refold.store (id) values (:'store_id');

create table refold.streams (
  stream        integer generated always as identity primary key,
  namespace     text not null,
  name          text not null,
  incarnation   text not null unique check (incarnation ~ '^[0-9a-f]{16}$'),
  uid           text,
  schema        text not null unique,
  partitions    integer not null check (partitions between 1 and 512),
  topic         text not null,
  kafka_cluster text,
  topic_id      text,
  state         text not null check (state in ('claimed', 'active', 'released')),
  migration     integer not null default 0,      -- the last of migrations/stream that was applied
  created_at    timestamptz not null default now(),
  unique (namespace, name),
  unique (kafka_cluster, topic),
  check ((state = 'released') = (uid is null))
);

-- Every append updates a row here, so updates must stay HOT and dead rows must go early.
create table refold.heads (
  stream      integer not null references refold.streams on delete cascade,
  partition   integer not null check (partition >= 0),
  head        bigint not null default 0 check (head >= 0),
  recorded_at timestamptz not null default 'epoch',
  active      boolean not null default false,    -- the stream's state is active; here an append finds it under its lock
  primary key (stream, partition)
) with (
  fillfactor = 50,
  autovacuum_vacuum_threshold = 500,
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_cost_delay = 0
);

-- History is append-only for its owner too. The triggers that call this are ENABLE ALWAYS, so that
-- session_replication_role doesn't silence them.
create function refold.refuse_change() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'history is append-only: % on %.% is refused', tg_op, tg_table_schema, tg_table_name
    using errcode = 'insufficient_privilege',
          hint = 'To delete or correct is to append an event that says so.';
end
$$;
revoke all on function refold.refuse_change() from public;

-- Kafka's murmur2 (org.apache.kafka.common.utils.Utils.murmur2) made positive: which partition a key belongs to.
create function refold.partition_of(subject text, partitions integer) returns integer
language plpgsql
immutable strict parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  m     constant bigint := 1540483477;    -- 0x5bd1e995
  mask  constant bigint := 4294967295;
  key   bytea := convert_to(subject, 'UTF8');
  size  integer := length(key);
  whole integer := size & ~3;
  h     bigint := 2538058380 # size;      -- seed 0x9747b28c
  k     bigint;
  i     integer := 0;
begin
  while i < whole loop
    k := get_byte(key, i) | (get_byte(key, i + 1) << 8) | (get_byte(key, i + 2) << 16)
         | (get_byte(key, i + 3)::bigint << 24);
    k := refold.multiply32(k, m);
    k := refold.multiply32(k # (k >> 24), m);
    h := refold.multiply32(h, m) # k;
    i := i + 4;
  end loop;
  if size - whole = 3 then h := h # (get_byte(key, whole + 2)::bigint << 16); end if;
  if size - whole >= 2 then h := h # (get_byte(key, whole + 1)::bigint << 8); end if;
  if size - whole >= 1 then h := refold.multiply32(h # get_byte(key, whole)::bigint, m); end if;
  h := h # (h >> 13);
  h := refold.multiply32(h, m);
  h := h # (h >> 15);
  return ((h & 2147483647) % partitions)::integer;
end
$$;

-- The low 32 bits of a product of two unsigned 32-bit numbers, by halves since bigint is signed and must not overflow.
create function refold.multiply32(a bigint, b bigint) returns bigint
language sql
immutable strict parallel safe
return ((a & 65535) * b + ((((a >> 16) * (b & 65535)) & 65535) << 16)) & 4294967295;

grant usage on schema refold to :"eventstore", :"relay", :"heads";
grant select on refold.store, refold.streams, refold.heads, refold.migrations to :"eventstore", :"relay", :"heads";
