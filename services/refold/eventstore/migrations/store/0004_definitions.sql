-- What the live version of each Projection folds, so that the event store can fold one subject's history by it. The
-- operator writes it; the event store knows neither read stores nor the cluster.
create table refold.definitions (
  namespace  text not null,
  name       text not null,
  uid        text not null,     -- the Projection's
  version    text not null,
  definition text not null,     -- refold.projection.definition.VersionDefinition as JSON
  primary key (namespace, name)
);
grant select on refold.definitions to :"eventstore";
