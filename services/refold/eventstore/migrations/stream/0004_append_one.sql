-- A lone append of one event, the most frequent of all, without the arrays of a group, which took most of its time.

-- Append one event: `stream`, `partition`, `expected` and the answer (outcome, revision, position) are those of append_group
-- for one append. The id isn't looked for where the expected revision is a number, as there without `careful`. Only the
-- service's own role may call this.
--
-- Concurrency: the first statement locks the head as append_group's does, and since nearly every append is accepted, it
-- moves it too. What can't be accepted at once is left to append_group in the same transaction, with the head put back.
create function :"schema".append_one(
  stream integer, partition integer, subject text, expected bigint, id text, type text, data jsonb, metadata jsonb
) returns bigint[]
language plpgsql
volatile security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  c_stream   constant integer := :stream;
  v_position bigint;
  v_now      timestamptz;
  v_known    boolean;
  v_revision bigint;
begin
  update refold.heads h set head = h.head + 1, recorded_at = greatest(clock_timestamp(), h.recorded_at)
  where h.stream = c_stream and h.partition = append_one.partition and h.active and append_one.stream = c_stream
  returning h.head, h.recorded_at into v_position, v_now;

  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'an append needs READ COMMITTED, this transaction is %', current_setting('transaction_isolation')
      using errcode = 'RF004';
  end if;
  if v_position is null then
    if append_one.stream = c_stream and exists (select from refold.heads h where h.stream = c_stream and h.active) then
      raise exception 'the stream has no such partition' using errcode = 'RF002';
    end if;
    raise exception 'the stream is not active' using errcode = 'RF001';
  end if;

  if expected < 0 then
    select true into v_known from :"schema".events h
    where h.partition = append_one.partition and h.subject = append_one.subject and h.id = append_one.id;
  end if;
  if v_known is null then
    insert into :"schema".events (partition, position, subject, revision, id, type, data, metadata, recorded_at)
    select append_one.partition, v_position, append_one.subject, c.revision + 1, append_one.id, append_one.type,
           append_one.data, append_one.metadata, v_now
    from (
      select coalesce((
        select h.revision from :"schema".events h
        where h.partition = append_one.partition and h.subject = append_one.subject order by h.revision desc limit 1
      ), 0) as revision
      offset 0
    ) c
    where case expected when -1 then true when -2 then c.revision > 0 else c.revision = expected end
    returning revision into v_revision;
  end if;
  if v_revision is not null then
    return array[0, v_revision, v_position];
  end if;

  update refold.heads h set head = v_position - 1, recorded_at = coalesce((
    select e.recorded_at from :"schema".events e
    where e.partition = append_one.partition and e.position = v_position - 1
  ), 'epoch')
  where h.stream = c_stream and h.partition = append_one.partition;
  return (
    select array[g.outcomes[1], g.revisions[1], g.positions[1]]
    from :"schema".append_group(
      append_one.stream, array[append_one.partition], true, array[append_one.subject], array[append_one.partition],
      array[expected], '{1}', '{1}', '{1}', '{0}', '{1}', '{f}', '{1}', array[append_one.subject], array[append_one.id],
      array[append_one.type], array[append_one.data], array[append_one.metadata]) g
  );
end
$$;
revoke all on function :"schema".append_one(integer, integer, text, bigint, text, text, jsonb, jsonb) from public;
grant execute on function :"schema".append_one(integer, integer, text, bigint, text, text, jsonb, jsonb)
  to :"eventstore";
