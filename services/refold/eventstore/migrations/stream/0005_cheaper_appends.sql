-- Cheaper appends: the functions see to what the table's constraints saw to, for PostgreSQL parses the text of a
-- constraint anew in each statement, for each partition that it inserts into; that was a tenth of an append.

-- Refuse what isn't the length that it must be; called by the functions below with values of which one isn't, so that only
-- a refusal costs a call. Where one is null, the table refuses it.
create function :"schema".refuse_value(subject text, id text, type text) returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v record;
begin
  for v in select * from (values ('subject', subject, 512), ('id', id, 255), ('type', type, 255)) as t (field, value, most)
  loop
    if octet_length(v.value) not between 1 and v.most then
      raise exception 'an event''s % has 1 to % bytes in UTF-8, not %', v.field, v.most, octet_length(v.value)
        using errcode = 'check_violation';
    end if;
  end loop;
  return subject;
end
$$;
revoke all on function :"schema".refuse_value(text, text, text) from public;
grant execute on function :"schema".refuse_value(text, text, text) to :"eventstore";

-- What it takes and answers, 0002_append.sql says; so do the grants, which stay.
--
-- The heads are locked by the first statement and moved by the last. One statement for both (a CTE that locks in order, an
-- update of what it found) was no faster, and would keep from the head's triggers the events that they look at.
create or replace function :"schema".append_group(
  stream integer, partitions integer[], careful boolean,
  a_subject text[], a_partition integer[], a_expected bigint[], a_events integer[], a_after integer[],
  a_partition_after integer[], a_subject_before integer[], a_key integer[], a_again boolean[],
  e_append integer[], e_subject text[], e_id text[], e_type text[], e_data jsonb[], e_metadata jsonb[],
  out outcomes bigint[], out revisions bigint[], out positions bigint[]
)
language plpgsql
volatile security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_nestloop = off
as $$
#variable_conflict use_column
declare
  c_stream   constant integer := :stream;
  v_count    constant integer := cardinality(a_subject);
  v_heads    bigint[];       -- of the partitions
  v_last     timestamptz;    -- the latest event of any of them
  v_active   boolean;
  v_now      timestamptz;
  v_ask      boolean[];      -- per append: whether its ids must be looked for
  v_keys     integer[];      -- the subjects where not simply all appends can be accepted
  v_problems integer[];      -- their appends
  v_shift    bigint[];       -- per partition: how many events were refused so far
  v_low      integer := 1;   -- the first append that was accepted and isn't inserted yet
  v_current  bigint;         -- the subject's revision
  v_found    bigint;         -- how many of an append's ids stand in history
  v_same     bigint;         -- and how many of them with the same type and data
  v_ordered  boolean;        -- and whether they are contiguous and in order
  v_revision bigint;         -- and the last one's revision
  v_position bigint;         -- and position
  v_first    bigint;
  i          integer;
  k          integer;
begin
  if cardinality(partitions) = 1 then
    select array[h.head], h.recorded_at, h.active into v_heads, v_last, v_active from refold.heads h
    where h.stream = c_stream and h.partition = partitions[1] for update;
  else
    with locked as (
      select h.head, h.recorded_at, h.active from refold.heads h
      where h.stream = c_stream and h.partition = any (partitions) order by h.partition for update
    )
    select array_agg(head), max(recorded_at), bool_and(active) into v_heads, v_last, v_active from locked;
  end if;

  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'an append needs READ COMMITTED, this transaction is %', current_setting('transaction_isolation')
      using errcode = 'RF004';
  end if;
  if stream is distinct from c_stream or not v_active then
    raise exception 'the stream is not active' using errcode = 'RF001';
  end if;
  if cardinality(v_heads) is distinct from cardinality(partitions) then
    raise exception 'the stream has no such partition' using errcode = 'RF002';
  end if;
  v_now := greatest(clock_timestamp(), v_last);

  -- What each append's last revision and position are if all are accepted, and the subjects where that isn't so. The
  -- aggregates take the rows in the order in which unnest gives them.
  select array_agg(current + subject_before + events),
         array_agg(v_heads[array_position(partitions, partition)] + partition_after),
         array_agg(current > 0 and (careful or expected < 0)),
         array_agg(key) filter (where again or case expected when -1 then false when -2 then current + subject_before = 0
                                                             else expected <> current + subject_before end)
  into revisions, positions, v_ask, v_keys
  from (
    select partition, expected, events, partition_after, subject_before, key, again, coalesce((
      select h.revision from :"schema".events h
      where h.partition = a.partition and h.subject = a.subject order by h.revision desc limit 1
    ), 0) as current
    from unnest(a_subject, a_partition, a_expected, a_events, a_partition_after, a_subject_before, a_key, a_again)
         as a (subject, partition, expected, events, partition_after, subject_before, key, again)
    offset 0
  ) a;
  if true = any (v_ask) then
    select v_keys || array_agg(a_key[e.append]) into v_keys
    from unnest(e_append, e_subject, e_id) as e (append, subject, id)
    where v_ask[e.append] and (
      select true from :"schema".events h
      where h.partition = a_partition[e.append] and h.subject = e.subject and h.id = e.id) is not null;
  end if;

  outcomes := array_fill(0::bigint, array[v_count]);
  if v_keys is not null then
    select array_agg(n) into v_problems from unnest(a_key) with ordinality as t (key, n) where key = any (v_keys);
  end if;
  if v_problems is null then    -- nearly always
    insert into :"schema".events (partition, position, subject, revision, id, type, data, metadata, recorded_at)
    select a_partition[append], positions[append] - a_after[append] + n,
           case when octet_length(subject) between 1 and 512 and octet_length(id) between 1 and 255
                     and octet_length(type) between 1 and 255
                then subject else :"schema".refuse_value(subject, id, type) end,
           revisions[append] - a_after[append] + n, id, type, data, metadata, v_now
    from unnest(e_append, e_subject, e_id, e_type, e_data, e_metadata)
         with ordinality as t (append, subject, id, type, data, metadata, n);
  else
    -- Decide the problems one by one, in order; each sees what was inserted before it. What lies between them is inserted
    -- at once.
    v_shift := array_fill(0::bigint, array[cardinality(partitions)]);
    foreach i in array v_problems || (v_count + 1) loop
      if v_low < i then
        for j in v_low .. i - 1 loop
          positions[j] := positions[j] - v_shift[array_position(partitions, a_partition[j])];
        end loop;
        v_first := a_after[v_low] - a_events[v_low] + 1;
        insert into :"schema".events (partition, position, subject, revision, id, type, data, metadata, recorded_at)
        select a_partition[append], positions[append] - a_after[append] + v_first + n - 1,
               case when octet_length(subject) between 1 and 512 and octet_length(id) between 1 and 255
                         and octet_length(type) between 1 and 255
                    then subject else :"schema".refuse_value(subject, id, type) end,
               revisions[append] - a_after[append] + v_first + n - 1, id, type, data, metadata, v_now
        from unnest(e_append[v_first:a_after[i - 1]], e_subject[v_first:a_after[i - 1]], e_id[v_first:a_after[i - 1]],
                    e_type[v_first:a_after[i - 1]], e_data[v_first:a_after[i - 1]], e_metadata[v_first:a_after[i - 1]])
             with ordinality as t (append, subject, id, type, data, metadata, n);
        v_low := i;
      end if;
      exit when i > v_count;

      v_first := a_after[i] - a_events[i] + 1;
      select coalesce(max(h.revision), 0) into v_current from (
        select h.revision from :"schema".events h
        where h.partition = a_partition[i] and h.subject = a_subject[i] order by h.revision desc limit 1) h;
      with h as materialized (
        select h.id, h.revision, h.position, h.type, h.data from :"schema".events h
        where h.partition = a_partition[i] and h.subject = a_subject[i] and h.id = any (e_id[v_first:a_after[i]])
      )
      select count(h.id), count(*) filter (where h.type = w.type and h.data = w.data),
             max(h.revision - w.n) = min(h.revision - w.n), max(h.revision), max(h.position)
      into v_found, v_same, v_ordered, v_revision, v_position
      from unnest(e_id[v_first:a_after[i]], e_type[v_first:a_after[i]], e_data[v_first:a_after[i]])
           with ordinality as w (id, type, data, n) left join h on h.id = w.id;

      if v_found = 0 and (case a_expected[i] when -1 then true when -2 then v_current > 0
                          else a_expected[i] = v_current end) then
        revisions[i] := v_current + a_events[i];
        continue;
      end if;
      k := array_position(partitions, a_partition[i]);
      v_shift[k] := v_shift[k] + a_events[i];
      v_low := i + 1;
      if v_found = a_events[i] and v_same = v_found and v_ordered then
        outcomes[i] := 1;
        revisions[i] := v_revision;
        positions[i] := v_position;
      else
        outcomes[i] := case when v_found = 0 then 2 else 3 end;
        revisions[i] := v_current;
        positions[i] := 0;
      end if;
    end loop;
  end if;

  if cardinality(partitions) = 1 then
    v_current := a_partition_after[v_count] - coalesce(v_shift[1], 0);
    if v_current > 0 then
      update refold.heads h set head = v_heads[1] + v_current, recorded_at = v_now
      where h.stream = c_stream and h.partition = partitions[1];
    end if;
  else
    update refold.heads h set head = x.head, recorded_at = v_now
    from (select partition, max(position) as head
          from unnest(a_partition, positions, outcomes) as t (partition, position, outcome)
          where outcome = 0 group by partition) x
    where h.stream = c_stream and h.partition = any (partitions) and h.partition = x.partition;
  end if;
end
$$;

-- What it takes and answers, 0004_append_one.sql says; so do the grants, which stay.
--
-- Its clock may be read before it gets the lock: where it waited for another append, the update is evaluated again for the
-- head as that left it, but where it waited for a transaction that only locked the head, it isn't. Whoever wants to know
-- that what comes later is recorded later must therefore write the heads (refold.eventstore.catalog.positions_at does).
create or replace function :"schema".append_one(
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
    select append_one.partition, v_position,
           case when octet_length(append_one.subject) between 1 and 512 and octet_length(append_one.id) between 1 and 255
                     and octet_length(append_one.type) between 1 and 255
                then append_one.subject
                else :"schema".refuse_value(append_one.subject, append_one.id, append_one.type) end,
           c.revision + 1, append_one.id, append_one.type, append_one.data, append_one.metadata, v_now
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

-- Last, for appends wait while this lock is held. It can't deadlock with them: nobody waits for a head who has locked these
-- tables, but a writer who appends twice in a transaction, and for him the migration gives way (refold.eventstore.online).
-- An append that waits for this lock, or for its head, as this is committed still runs the former function: the lengths of
-- its values are looked at by the event store alone, so of a writer's in SQL in that moment by nobody.
alter table :"schema".events
  drop constraint if exists events_position_check, drop constraint if exists events_subject_check,
  drop constraint if exists events_revision_check, drop constraint if exists events_id_check,
  drop constraint if exists events_type_check;
