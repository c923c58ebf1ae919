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
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ with .Values.image.digest }}@{{ . }}{{ end }}
{{- end }}

{{/* Where pods of a component are put: one node or zone that goes should not take all of them along. Argument: (list $ component). */}}
{{- define "refold.scheduling" -}}
{{- with get (get (first .).Values (last .)) "priorityClassName" }}
priorityClassName: {{ . }}
{{- end }}
topologySpreadConstraints:
{{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "refold.selector" $ | nindent 8 }}
{{- end }}
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

{{/* Annotations of what `helm test` makes. Argument: its place in the order. */}}
{{- define "refold.testHook" -}}
helm.sh/hook: test
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
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

{{/* Where `helm test` makes its stream. */}}
{{- define "refold.testNamespace" -}}
{{- first (append .Values.tenants.namespaces .Release.Namespace) -}}
{{- end }}

{{- define "refold.tenantsEnv" -}}
{{- with .Values.tenants.namespaces }}
- {name: REFOLD_NAMESPACES, value: {{ toJson . | quote }}}
{{- end }}
- {name: REFOLD_TOPIC_PREFIXES, value: {{ toJson .Values.tenants.topicPrefixes | quote }}}
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

{{/* Empty where the installation has no Redis. */}}
{{- define "refold.redisAdminSecret" -}}
{{- if .Values.embedded.enabled -}}
refold-redis-admin
{{- else -}}
{{ .Values.redis.adminSecret }}
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

{{/* Refuses settings of kafka.security that can't work together. */}}
{{- define "refold.kafkaCheck" -}}
{{- $sasl := hasPrefix "SASL" .protocol -}}
{{- if and $sasl (not .relaySecret) }}{{ fail "kafka.security.relaySecret is missing: give the name of a Secret with username and password, or set kafka.security.protocol to one without SASL" }}{{ end -}}
{{- if and $sasl (not .operatorSecret) }}{{ fail "kafka.security.operatorSecret is missing: give the name of a Secret with username and password, or set kafka.security.protocol to one without SASL" }}{{ end -}}
{{- if and $sasl (not .projectorSecret) (not .manageUsers) }}{{ fail "kafka.security.projectorSecret is missing: give the name of a Secret with username and password, or set kafka.security.manageUsers=true, so that the operator makes a user for each Projection" }}{{ end -}}
{{- if and .manageUsers (or (not $sasl) (eq .mechanism "PLAIN")) }}{{ fail "kafka.security.manageUsers makes SCRAM users: it needs kafka.security.protocol SASL_SSL or SASL_PLAINTEXT, and a SCRAM mechanism" }}{{ end -}}
{{- if and .manageAcls (not .relayPrincipal) }}{{ fail "kafka.security.relayPrincipal is missing: kafka.security.manageAcls needs to know whom to let write, such as User:refold-relay" }}{{ end -}}
{{- if and .manageAcls (not .manageUsers) (not .projectorPrincipal) }}{{ fail "kafka.security.projectorPrincipal is missing: kafka.security.manageAcls needs to know whom to let read, such as User:refold-projector, or kafka.security.manageUsers" }}{{ end -}}
{{- end }}

{{/* Variables that tell a process of Kafka. Argument: (list $ name-of-its-Secret). */}}
{{- define "refold.kafkaEnv" -}}
{{- $root := first . -}}{{- $secret := last . -}}
{{- $security := $root.Values.kafka.security -}}
- {name: REFOLD_KAFKA_BOOTSTRAP, value: {{ include "refold.kafkaBootstrap" $root | quote }}}
{{- if ne $security.protocol "PLAINTEXT" }}
{{- if $root.Values.embedded.enabled }}{{ fail "the embedded Kafka speaks PLAINTEXT only: leave kafka.security.protocol, or give your own Kafka and set embedded.enabled=false" }}{{ end }}
- {name: REFOLD_KAFKA_SECURITY_PROTOCOL, value: {{ $security.protocol }}}
{{- if hasPrefix "SASL" $security.protocol }}
- {name: REFOLD_KAFKA_SASL_MECHANISM, value: {{ $security.mechanism }}}
- {name: REFOLD_KAFKA_USERNAME, value: {{ $secret | quote }}}
{{- end }}
{{- if $secret }}
- {name: REFOLD_KAFKA_CREDENTIALS, value: /etc/refold/kafka/login}
{{- end }}
{{- if $security.caSecret }}
- {name: REFOLD_KAFKA_CA, value: /etc/refold/kafka/ca/ca.crt}
{{- end }}
{{- end }}
{{- end }}

{{/* Which Secrets those variables speak of, by the folder's name, as JSON. Argument: (list $ name-of-its-Secret). */}}
{{- define "refold.kafkaSecrets" -}}
{{- $root := first . -}}{{- $secret := last . -}}
{{- $security := $root.Values.kafka.security -}}
{{- $found := dict -}}
{{- if ne $security.protocol "PLAINTEXT" -}}
{{- if $secret }}{{ $_ := set $found "login" $secret }}{{ end -}}
{{- if $security.caSecret }}{{ $_ := set $found "ca" $security.caSecret }}{{ end -}}
{{- end -}}
{{- toJson $found -}}
{{- end }}

{{/* Mounts of Secrets for Kafka. Argument: what refold.kafkaSecrets returns, as a dict. */}}
{{- define "refold.kafkaMounts" -}}
{{- range $folder, $_ := . }}
- {name: kafka-{{ $folder }}, mountPath: /etc/refold/kafka/{{ $folder }}, readOnly: true}
{{- end }}
{{- end }}

{{/* Their volumes. */}}
{{- define "refold.kafkaVolumes" -}}
{{- range $folder, $secret := . }}
- {name: kafka-{{ $folder }}, secret: {secretName: {{ $secret }}, defaultMode: 0440}}
{{- end }}
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
