-- The operator's role: makes roles, and owns the two databases. Not a superuser. Every statement may run again.
\getenv password REFOLD_ADMIN_PASSWORD
select 'create role refold_admin' where not exists (select from pg_roles where rolname = 'refold_admin') \gexec
alter role refold_admin with login createrole nosuperuser nocreatedb noreplication password :'password';
select format('create database %I owner refold_admin', wanted)
  from unnest(array['refold_store', 'refold_read']) as wanted
  where not exists (select from pg_database where datname = wanted) \gexec
