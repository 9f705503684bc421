{{/* What pods have in common. */}}

{{/* A setting as text. Helm reads every number as a fraction, and would write large ones as 1.07e+09. */}}
{{- define "gradwire.text" -}}
{{- if kindIs "slice" . }}{{ join "," . }}
{{- else if and (kindIs "float64" .) (eq . (floor .)) }}{{ int64 . }}
{{- else }}{{ toString . }}
{{- end }}
{{- end -}}

{{/* Settings as environment variables: (dict "prefix" "GRADWIRE_STAGE_" "settings" (dict "listen" …)). */}}
{{- define "gradwire.env" -}}
{{- $prefix := .prefix }}
{{- range $field, $value := .settings }}
- name: {{ $prefix }}{{ upper $field }}
  value: {{ include "gradwire.text" $value | quote }}
{{- end }}
{{- end -}}

{{/* Settings of mutual TLS, as YAML, with the keys' names as in secrets of the type kubernetes.io/tls. */}}
{{- define "gradwire.tls" -}}
tls_authority: /certs/ca.crt
tls_certificate: /certs/tls.crt
tls_key: /certs/tls.key
{{- end -}}

{{/* Where to run, and as whom: (dict "root" $ "values" .Values.stage). */}}
{{- define "gradwire.pod" -}}
automountServiceAccountToken: false
# Otherwise a service's name makes variables that could be read as settings: GRADWIRE_COORDINATOR_PORT.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "gradwire.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{/* Kubernetes' own gRPC probe has no certificate, so it would get no answer: (dict "root" $ "program" "…"). */}}
{{- define "gradwire.probes" -}}
{{- $program := .program }}
{{- range $kind, $times := .root.Values.probes }}
{{ $kind }}Probe:
  exec:
    command: [{{ $program }}, --health]
  {{- toYaml $times | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The volume at /certs: (dict "root" $ "role" "stage"). Its files may be replaced at any time. */}}
{{- define "gradwire.certsVolume" -}}
- name: certs
  secret:
    secretName: {{ include "gradwire.secret" . }}
    # For the group alone: the files are root's.
    defaultMode: 0440
{{- end -}}
