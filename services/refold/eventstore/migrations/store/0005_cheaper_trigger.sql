-- The trigger that refuses unchecked events, cheaper for streams without event types.

-- PostgreSQL parses the text of a trigger's condition anew in each statement, so a short one costs an append a twentieth
-- less. What was asked there is asked by the function, which runs only for streams with event types.
create or replace function refold.refuse_unchecked() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if nullif(current_setting('refold.event_types', true), '') is null
     or not pg_has_role(session_user, :'eventstore', 'usage') then
    raise exception 'the stream has event types with schemas, which PostgreSQL can''t check' using errcode = 'RF006',
      hint = 'Append through the event store, by HTTP or as its library.';
  end if;
  if new.types_revision::text <> current_setting('refold.event_types', true) then
    raise exception 'the events were checked with revision % of the event types, the stream is at %',
      current_setting('refold.event_types', true), new.types_revision using errcode = 'RF006';
  end if;
  return null;
end
$$;

-- Waits for the appends under way, in all streams, but for no reader.
create or replace trigger refuse_unchecked after update of head on refold.heads
  for each row when (new.types_revision is not null) execute function refold.refuse_unchecked();
alter table refold.heads enable always trigger refuse_unchecked;    -- which the statement before has taken back
