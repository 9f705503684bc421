{{/* What things are called, and by what they are found. */}}

{{- define "gradwire.fullname" -}}
{{- $name := .Values.fullnameOverride | default (contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name)) -}}
{{- /* Pods' names get a role and a number behind it, and are labels in host names. */ -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$" $name) -}}
{{- fail (printf "%q cannot begin the names of services: expected 1 to 40 lower-case letters, digits and hyphens, with a letter first; choose another release name, or set fullnameOverride" $name) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* What selects the pods of a component: (dict "root" $ "component" "stage"). Without a component: the release's. */}}
{{- define "gradwire.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "gradwire.labels" -}}
{{ include "gradwire.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Of services: what Prometheus calls the job that reads their metrics. Alerts and dashboards ask for these names. */}}
{{- define "gradwire.job" -}}
gradwire/job: {{ .program }}
{{- end -}}

{{/* The image of a component: (dict "root" $ "image" .Values.stage.image "suffix" "-cuda"). */}}
{{- define "gradwire.image" -}}
{{- $tag := .image.tag | default (printf "%s%s" (.root.Values.image.tag | default .root.Chart.AppVersion) (.suffix | default "")) -}}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ .image.repository }}:{{ $tag }}
{{- end -}}

{{/* The secret with a role's certificate: (dict "root" $ "role" "stage"). */}}
{{- define "gradwire.secret" -}}
{{- index .root.Values.certificates.secrets .role | default (printf "%s-%s-tls" (include "gradwire.fullname" .root) .role) -}}
{{- end -}}

{{/* HOST:PORT of the coordinator, as servers and clients dial it. */}}
{{- define "gradwire.coordinator" -}}
{{ include "gradwire.fullname" . }}-coordinator.{{ .Release.Namespace }}.svc:7070
{{- end -}}

{{- define "gradwire.checkpointsClaim" -}}
{{- .Values.checkpoints.existingClaim | default (printf "%s-checkpoints" (include "gradwire.fullname" .)) -}}
{{- end -}}

{{- define "gradwire.stateClaim" -}}
{{- .Values.coordinator.state.existingClaim | default (printf "%s-state" (include "gradwire.fullname" .)) -}}
{{- end -}}
