-- Which event types a stream takes, and the JSON Schemas of their data (EventStream's spec.events).

-- `revision` counts the states of a stream's event types; 0: it never had any. A stream without a row takes any event.
alter table refold.streams add column types_revision integer not null default 0 check (types_revision >= 0);
create table refold.event_types (
  stream   integer primary key references refold.streams on delete cascade,
  types    text not null     -- JSON: {name: schema}
);
-- The revision again, where an append finds it under its lock; null: any event is taken.
alter table refold.heads add column types_revision integer;

-- PostgreSQL can't check a JSON Schema, so whoever appends says which revision its events were checked with, in
-- refold.event_types. Asked at the end of an append, under the head's lock, which a change of the types takes too: so from
-- the moment that the change is committed no event gets in that was checked with another revision. A condition of a
-- trigger costs an append nothing that could be measured; the function runs only to refuse.
create function refold.refuse_unchecked() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if nullif(current_setting('refold.event_types', true), '') is null
     or not pg_has_role(session_user, :'eventstore', 'usage') then
    raise exception 'the stream has event types with schemas, which PostgreSQL can''t check' using errcode = 'RF006',
      hint = 'Append through the event store, by HTTP or as its library.';
  end if;
  raise exception 'the events were checked with revision % of the event types, the stream is at %',
    current_setting('refold.event_types', true), new.types_revision using errcode = 'RF006';
end
$$;
revoke all on function refold.refuse_unchecked() from public;

-- What a login says is believed of the event store alone.
create trigger refuse_unchecked after update of head on refold.heads
  for each row
  when (new.types_revision is not null and (
    new.types_revision::text is distinct from current_setting('refold.event_types', true)
    or not pg_has_role(session_user, :'eventstore', 'usage')))
  execute function refold.refuse_unchecked();
alter table refold.heads enable always trigger refuse_unchecked;

grant select on refold.event_types to :"eventstore";
