-- What the event store's limits keep out by HTTP and in the library, a stream's writer could append in SQL: an event too
-- large for its topic, at which the relay of its partition would stop.

-- Bytes of data and metadata, as PostgreSQL writes them, that every topic takes; the operator says how many. Null: any.
alter table refold.store add column topic_bytes bigint check (topic_bytes > 0);

create function refold.refuse_too_large() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
-- It runs within an append, which scans no table; here that would make a plan of so high a cost that it is compiled (JIT).
set enable_seqscan = on
as $$
declare
  v_most   bigint;
  v_schema text;
  v_id     text;
  v_size   bigint;
begin
  select topic_bytes into v_most from refold.store;
  if v_most is null then
    return null;
  end if;
  select schema into v_schema from refold.streams where stream = new.stream;
  execute format('select id, size from (select id, octet_length(data::text) + coalesce(octet_length(metadata::text), 0) as size '
    'from %I.events where partition = $1 and position > $2 and position <= $3) e where size > $4 limit 1', v_schema)
    into v_id, v_size using new.partition, old.head, new.head, v_most;
  if v_size is not null then
    raise exception 'the event % has % bytes of data and metadata as PostgreSQL writes them, topics take %', v_id, v_size, v_most
      using errcode = 'RF003', hint = 'eventstore.limits.eventBytes of the chart is two thirds of that.';
  end if;
  return null;
end
$$;
revoke all on function refold.refuse_too_large() from public;

-- The event store has looked already, and pays no more than a comparison for this.
create trigger refuse_too_large after update of head on refold.heads
  for each row when (session_user <> :'eventstore') execute function refold.refuse_too_large();
alter table refold.heads enable always trigger refuse_too_large;
