-- Atomic appends to many subjects of one stream.

-- Append a group whole or not at all: the arguments are those of append_group, each append is to another subject, and
-- unless all of them are appended, or all replayed, nothing is written.
--
-- Out, per append: where all are appended or all replayed, what append_group says. Else 1 its events are known (and those
-- of another aren't), 2 the expected revision is wrong, 3 ids are known with other content, 4 nothing is wrong with this
-- one; and the subject's current revision and 0.
--
-- Concurrency: nothing here touches a table before append_group's first statement, which locks all heads of the group in
-- the order of the partitions; so two groups that cross wait for each other in that order and can't deadlock. What was
-- found out under the locks is kept in variables, which the subtransaction of the exception handler doesn't undo.
create function :"schema".append_all(
  stream integer, partitions integer[], careful boolean,
  a_subject text[], a_partition integer[], a_expected bigint[], a_events integer[], a_after integer[],
  a_partition_after integer[], a_subject_before integer[], a_key integer[], a_again boolean[],
  e_append integer[], e_subject text[], e_id text[], e_type text[], e_data jsonb[], e_metadata jsonb[],
  out outcomes bigint[], out revisions bigint[], out positions bigint[]
)
language plpgsql
volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  select * into outcomes, revisions, positions from :"schema".append_group(
    stream, partitions, careful, a_subject, a_partition, a_expected, a_events, a_after, a_partition_after,
    a_subject_before, a_key, a_again, e_append, e_subject, e_id, e_type, e_data, e_metadata);
  if 0 = all (outcomes) or 1 = all (outcomes) then
    return;
  end if;
  select array_agg(case outcome when 0 then 4 else outcome end order by n),
         array_agg(case outcome when 0 then revision - events
                   when 1 then (select max(h.revision) from :"schema".events h
                                where h.partition = t.partition and h.subject = t.subject)
                   else revision end order by n),
         array_agg(0::bigint)
  into outcomes, revisions, positions
  from unnest(outcomes, revisions, a_events, a_partition, a_subject)
       with ordinality as t (outcome, revision, events, partition, subject, n);
  raise exception using errcode = 'RF005', message = 'nothing is appended, for not all can be';
exception when sqlstate 'RF005' then
  null;
end
$$;
revoke all on function :"schema".append_all(
  integer, integer[], boolean, text[], integer[], bigint[], integer[], integer[], integer[], integer[], integer[],
  boolean[], integer[], text[], text[], text[], jsonb[], jsonb[]) from public;
grant execute on function :"schema".append_all(
  integer, integer[], boolean, text[], integer[], bigint[], integer[], integer[], integer[], integer[], integer[],
  boolean[], integer[], text[], text[], text[], jsonb[], jsonb[]) to :"eventstore";

-- Append whole or not at all as the stream's writer: what `append` takes and answers, each append to another subject.
-- Unless all are appended or all replayed, nothing is written, and outcomes are revision-conflict, id-conflict and, where
-- nothing is wrong with an append but with another, not-appended; with the subject's current revision and no position.
create function :"schema".append_all(appends jsonb)
returns table (outcome text, revision bigint, "partition" integer, "position" bigint)
language plpgsql
volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_outcomes   text[];
  v_revisions  bigint[];
  v_partitions integer[];
  v_positions  bigint[];
begin
  begin
    select array_agg(t.outcome order by n), array_agg(t.revision order by n), array_agg(t.partition order by n),
           array_agg(t.position order by n)
    into v_outcomes, v_revisions, v_partitions, v_positions
    from :"schema".append(appends) with ordinality as t (outcome, revision, partition, position, n);
    if exists (select from jsonb_array_elements(appends) as t (a) group by a ->> 'subject' having count(*) > 1) then
      raise exception 'a subject stands in an atomic append once: give all its events to one append'
        using errcode = 'RF003';
    end if;
    if not ('appended' = all (v_outcomes) or 'replayed' = all (v_outcomes)) then
      select array_agg(case outcome when 'appended' then 'not-appended' when 'replayed' then 'id-conflict'
                       else outcome end order by n),
             array_agg(case outcome when 'appended' then revision - jsonb_array_length(appends -> (n::integer - 1) -> 'events')
                       when 'replayed' then (select max(h.revision) from :"schema".events h
                                             where h.partition = t.partition
                                               and h.subject = appends -> (n::integer - 1) ->> 'subject')
                       else revision end order by n),
             array_agg(null::bigint)
      into v_outcomes, v_revisions, v_positions
      from unnest(v_outcomes, v_revisions, v_partitions)
           with ordinality as t (outcome, revision, partition, n);
      raise exception using errcode = 'RF005', message = 'nothing is appended, for not all can be';
    end if;
  exception when sqlstate 'RF005' then
    null;
  end;
  return query select * from unnest(v_outcomes, v_revisions, v_partitions, v_positions);
end
$$;
revoke all on function :"schema".append_all(jsonb) from public;
grant execute on function :"schema".append_all(jsonb) to :"writer";
