{{/* Labels of an object. Argument: (list $ component). */}}
{{- define "refold.labels" -}}
{{- $root := first . -}}
helm.sh/chart: {{ $root.Chart.Name }}-{{ $root.Chart.Version }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{ include "refold.selector" . }}
{{- end }}

{{/* Labels that select the pods of a component. Argument: (list $ component). */}}
{{- define "refold.selector" -}}
{{ include "refold.release" (first .) }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{/* Labels that select all of this release's pods. Pods that the operator makes don't carry the instance. */}}
{{- define "refold.release" -}}
app.kubernetes.io/name: refold
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: refold
{{- end }}

{{- define "refold.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* Restricted Pod Security, of a pod. Argument: the uid, also the group and the group of the volumes. */}}
{{- define "refold.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Restricted Pod Security, of a container. */}}
{{- define "refold.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Port and probes that every process of Refold has. */}}
{{- define "refold.portAndProbes" -}}
ports:
  - {name: http, containerPort: 8080}
startupProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 3
{{- end }}

{{- define "refold.storeAdminSecret" -}}
{{- if .Values.embedded.enabled -}}
refold-store-admin
{{- else -}}
{{ .Values.store.adminSecret | required "store.adminSecret is missing: give the name of a Secret with the key dsn (a postgresql:// URI of the event store's database, for a role that owns it and has CREATEROLE), or set embedded.enabled=true to try Refold out" }}
{{- end -}}
{{- end }}

{{- define "refold.readStoreAdminSecret" -}}
{{- if .Values.embedded.enabled -}}
refold-readstore-admin
{{- else -}}
{{ .Values.readStore.adminSecret | required "readStore.adminSecret is missing: give the name of a Secret with the key dsn (a postgresql:// URI of the read models' database, for a role that owns it and has CREATEROLE), or set embedded.enabled=true to try Refold out" }}
{{- end -}}
{{- end }}

{{/* The event store's limits as variables; one that lies above what holds it can't be meant. */}}
{{- define "refold.limits" -}}
{{- $limits := .Values.eventstore.limits -}}
{{- range list (list "metadataBytes" "eventBytes") (list "eventBytes" "appendBytes") (list "appendBytes" "bodyBytes") -}}
{{- $part := get $limits (first .) | int64 -}}{{- $whole := get $limits (last .) | int64 -}}
{{- if gt $part $whole -}}
{{- fail (printf "eventstore.limits.%s is %d, over eventstore.limits.%s, which is %d" (first .) $part (last .) $whole) -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := $limits }}
- {name: REFOLD_{{ $name | snakecase | upper }}, value: {{ $value | int64 | quote }}}
{{- end }}
{{- end }}

{{- define "refold.kafkaBootstrap" -}}
{{- if .Values.embedded.enabled -}}
refold-kafka.{{ .Release.Namespace }}.svc:9092
{{- else -}}
{{ .Values.kafka.bootstrapServers | required "kafka.bootstrapServers is missing: give host:port of your Kafka, or set embedded.enabled=true to try Refold out" }}
{{- end -}}
{{- end }}

{{/*
A Secret's value: what the cluster holds, else a new random one. Argument: (list $ name key).
The first of several callers in one rendering decides: later ones find it in $.Release (the lookup alone would give each another).
*/}}
{{- define "refold.keptRandom" -}}
{{- $root := index . 0 -}}{{- $name := index . 1 -}}{{- $key := index . 2 -}}
{{- $memory := printf "random/%s/%s" $name $key -}}
{{- if not (hasKey $root.Release $memory) -}}
{{- $found := dig "data" $key "" (lookup "v1" "Secret" $root.Release.Namespace $name | default dict) -}}
{{- $_ := set $root.Release $memory ($found | b64dec | default (randAlphaNum 32)) -}}
{{- end -}}
{{- get $root.Release $memory -}}
{{- end }}
