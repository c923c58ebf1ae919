-- Appending to one stream.

-- Append a group: many appends, each with its own outcome, in one transaction.
--
-- In: the stream's catalog number (a caller that knows an earlier stream of this name is refused); the partitions that
-- are touched, each once, in order; whether to look for ids also where the expected revision is right (`careful`, see
-- below). Per append: subject, its partition, the expected revision (a number; -1 any, -2 exists), how many events it has
-- (at least one, of distinct ids), how many the group has up to and with it (a_after), the same in its partition alone
-- (a_partition_after), how many of its subject's stand before it in the group (a_subject_before), the number of its subject
-- among the group's subjects (a_key), and whether an id of it stands in an earlier append of its subject (a_again). Per
-- event, in the order of the appends: the number of its append (from 1), its subject, id, type, data and metadata.
-- Only the service's own role may call this, since it believes all of that; `append` below computes it.
--
-- Out, per append: 0 appended, 1 replayed, 2 the expected revision is wrong, 3 an id is known with other content; then
-- the revision and the position of its last event (0, 1), or the subject's current revision and 0 (2, 3).
--
-- Where the expected revision is a number and right, ids aren't looked for first, since a retry expects a revision that
-- has passed. Should one be known all the same, the unique index refuses the group, and the caller asks again, carefully.
--
-- Concurrency: the first statement locks the heads in the order of the partitions; every later one has a later snapshot
-- (READ COMMITTED) and so sees all that was committed under those locks. They are held until commit, so positions are
-- gapless and in commit order. An append waits for the one before it in its partition and for nothing else.
--
-- Plans are generic, and neither scan a table nor nest loops: the arrays' sizes aren't known when they are made.
create function :"schema".append_group(
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
    v_shift := array_fill(0::bigint, array[cardinality(partitions)]);
  end if;

  -- Decide the problems one by one, in order; each sees what was inserted before it. What lies between them is inserted
  -- at once; where there is none, that is the whole group.
  foreach i in array coalesce(v_problems, '{}') || (v_count + 1) loop
    if v_low < i then
      if v_problems is not null then
        for j in v_low .. i - 1 loop
          positions[j] := positions[j] - v_shift[array_position(partitions, a_partition[j])];
        end loop;
      end if;
      v_first := a_after[v_low] - a_events[v_low] + 1;
      insert into :"schema".events (partition, position, subject, revision, id, type, data, metadata, recorded_at)
      select a_partition[append], positions[append] - a_after[append] + v_first + n - 1, subject,
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
    where h.stream = c_stream and h.partition = x.partition;
  end if;
end
$$;
revoke all on function :"schema".append_group(
  integer, integer[], boolean, text[], integer[], bigint[], integer[], integer[], integer[], integer[], integer[],
  boolean[], integer[], text[], text[], text[], jsonb[], jsonb[]) from public;
grant execute on function :"schema".append_group(
  integer, integer[], boolean, text[], integer[], bigint[], integer[], integer[], integer[], integer[], integer[],
  boolean[], integer[], text[], text[], text[], jsonb[], jsonb[]) to :"eventstore";

-- Append as the stream's writer: [{"subject", "expected": number | "any" | "none" | "exists" (default "any"),
-- "events": [{"id", "type", "data", "metadata"?}, …]}, …], at most 1,000 events; per append, in order: its outcome
-- (appended, replayed, revision-conflict, id-conflict), revision and position as append_group says, and the partition.
-- The partition is computed here, so a writer can't put an event where it doesn't belong.
create function :"schema".append(appends jsonb)
returns table (outcome text, revision bigint, "partition" integer, "position" bigint)
language plpgsql
volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  a_subject text[]; a_partition integer[]; a_expected bigint[]; a_events integer[]; a_after integer[];
  a_partition_after integer[]; a_subject_before integer[]; a_key integer[]; a_again boolean[];
  e_append integer[]; e_subject text[]; e_id text[]; e_type text[]; e_data jsonb[]; e_metadata jsonb[];
  v record;
begin
  if jsonb_typeof(appends) is distinct from 'array' or jsonb_array_length(appends) = 0 or exists (
    select from jsonb_array_elements(appends) as t (a)
    where jsonb_typeof(a -> 'subject') is distinct from 'string'
       or jsonb_typeof(a -> 'events') is distinct from 'array'
       or case jsonb_typeof(a -> 'expected')
            when 'number' then (a ->> 'expected')::numeric <> trunc((a ->> 'expected')::numeric)
                               or (a ->> 'expected')::numeric not between 0 and 9223372036854775807
            when 'string' then a ->> 'expected' not in ('any', 'none', 'exists')
            else a ? 'expected' end
  ) then
    raise exception 'not a list of {"subject", "expected"?, "events"}' using errcode = 'RF003';
  end if;
  if exists (
    select from jsonb_array_elements(appends) as t (a)
    where jsonb_array_length(a -> 'events') not between 1 and 1000
       or jsonb_array_length(a -> 'events') <> (
            select count(distinct e ->> 'id') from jsonb_array_elements(a -> 'events') as u (e)
            where jsonb_typeof(e -> 'id') = 'string' and jsonb_typeof(e -> 'type') = 'string' and e ? 'data')
  ) then
    raise exception 'events are 1 to 1,000 of {"id", "type", "data", "metadata"?} with distinct ids'
      using errcode = 'RF003';
  end if;
  select array_agg(subject order by n), array_agg(partition order by n), array_agg(expected order by n),
         array_agg(events order by n), array_agg(after order by n), array_agg(partition_after order by n),
         array_agg(subject_after - events order by n), array_agg(key order by n),
         array_agg(subject_after > events order by n)  -- more often than need be: all but a subject's first
  into a_subject, a_partition, a_expected, a_events, a_after, a_partition_after, a_subject_before, a_key, a_again
  from (
    select subject, partition, expected, events, n,
           sum(events) over (order by n) as after,
           sum(events) over (partition by partition order by n) as partition_after,
           sum(events) over (partition by subject order by n) as subject_after,
           dense_rank() over (order by subject) as key
    from (
      select a ->> 'subject' as subject, refold.partition_of(a ->> 'subject', :partitions) as partition,
             case a ->> 'expected' when 'any' then -1 when 'none' then 0 when 'exists' then -2
             else coalesce((a ->> 'expected')::numeric::bigint, -1) end as expected,
             jsonb_array_length(a -> 'events') as events, n
      from jsonb_array_elements(appends) with ordinality as t (a, n)
    ) a
  ) a;
  select array_agg(t.n order by t.n, u.n), array_agg(a ->> 'subject' order by t.n, u.n),
         array_agg(e ->> 'id' order by t.n, u.n), array_agg(e ->> 'type' order by t.n, u.n),
         array_agg(e -> 'data' order by t.n, u.n),
         array_agg(nullif(e -> 'metadata', 'null'::jsonb) order by t.n, u.n)
  into e_append, e_subject, e_id, e_type, e_data, e_metadata
  from jsonb_array_elements(appends) with ordinality as t (a, n),
       jsonb_array_elements(a -> 'events') with ordinality as u (e, n);
  if cardinality(e_id) > 1000 then
    raise exception 'at most 1,000 events are appended at once, not %', cardinality(e_id) using errcode = 'RF003';
  end if;
  select * into v from :"schema".append_group(
    :stream, array(select distinct p from unnest(a_partition) p order by p), true,
    a_subject, a_partition, a_expected, a_events, a_after, a_partition_after, a_subject_before, a_key, a_again,
    e_append, e_subject, e_id, e_type, e_data, e_metadata);
  return query
    select (array['appended', 'replayed', 'revision-conflict', 'id-conflict'])[o + 1], r, q, nullif(p, 0)
    from unnest(v.outcomes, v.revisions, a_partition, v.positions) with ordinality as t (o, r, q, p, n) order by n;
end
$$;
revoke all on function :"schema".append(jsonb) from public;
grant execute on function :"schema".append(jsonb) to :"writer";
