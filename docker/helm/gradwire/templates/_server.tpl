{{/*
A StatefulSet of stage or parameter servers, its headless service and its budget:
(dict "root" $ "component" "stage" "program" "gradwire-stage-server" "values" .Values.stage).
*/}}
{{- define "gradwire.server" -}}
{{- $root := .root }}
{{- $values := .values }}
{{- $name := printf "%s-%s" (include "gradwire.fullname" .root) .component }}
{{- $gpu := .values.gpu }}
{{- $settings := merge (dict
      "listen" (printf "%s:7080" .root.Values.listenHost)
      "advertise" (printf "{hostname}.%s.%s.svc:7080" $name .root.Release.Namespace)
      "coordinator" (include "gradwire.coordinator" .root)
      "metrics_listen" (printf "%s:9464" .root.Values.listenHost)
      "device" (ternary "cuda" "cpu" $gpu.enabled)
      "threads" .values.threads
      "grace_seconds" .root.Values.graceSeconds
      "shared_memory" (not (empty .values.sharedMemoryHostPath))
    ) (include "gradwire.tls" .root | fromYaml) .values.settings }}
{{- if .values.sharedMemoryHostPath }}{{ $_ := set $settings "shared_memory_directory" "/run/gradwire" }}{{ end }}
{{- if .root.Values.checkpoints.enabled }}{{ $_ := set $settings "checkpoint_root" "/checkpoints" }}{{ end }}
{{- if .root.Values.weights.existingClaim }}{{ $_ := set $settings "weights_root" "/weights" }}{{ end }}
{{- $resources := deepCopy .values.resources }}
{{- if $gpu.enabled }}
{{- $limits := merge (dict $gpu.resourceName $gpu.count) ($resources.limits | default dict) }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  labels:
    {{- include "gradwire.labels" . | nindent 4 }}
    {{- include "gradwire.job" . | nindent 4 }}
spec:
  # Each pod has a name of its own, which is in its certificate. Known also while it is not ready: the coordinator
  # calls it back as soon as it has registered.
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    {{- include "gradwire.selector" . | nindent 4 }}
  ports:
    - name: grpc
      port: 7080
      targetPort: grpc
      appProtocol: grpc
    - name: metrics
      port: 9464
      targetPort: metrics
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $name }}
  labels:
    {{- include "gradwire.labels" . | nindent 4 }}
spec:
  replicas: {{ .values.replicas }}
  serviceName: {{ $name }}
  # No server waits for another one.
  podManagementPolicy: Parallel
  updateStrategy:
    type: {{ .values.updateStrategy }}
  selector:
    matchLabels:
      {{- include "gradwire.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "gradwire.labels" . | nindent 8 }}
        {{- with .values.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      terminationGracePeriodSeconds: {{ add .root.Values.graceSeconds 15 }}
      {{- include "gradwire.pod" . | nindent 6 }}
      containers:
        - name: {{ .component }}
          image: {{ include "gradwire.image" (dict "root" .root "image" .values.image "suffix" (ternary "-cuda" "" $gpu.enabled)) }}
          command: [{{ .program }}]
          {{- include "gradwire.container" .root | nindent 10 }}
          env:
            {{- include "gradwire.env" (dict "prefix" "GRADWIRE_STAGE_" "settings" $settings) | trim | nindent 12 }}
          ports:
            - name: grpc
              containerPort: 7080
            - name: metrics
              containerPort: 9464
          {{- include "gradwire.probes" . | trim | nindent 10 }}
          resources:
            {{- toYaml $resources | nindent 12 }}
          volumeMounts:
            - name: certs
              mountPath: /certs
              readOnly: true
            - name: tmp
              mountPath: /tmp
            - name: run
              mountPath: /run/gradwire
            {{- if .root.Values.checkpoints.enabled }}
            - name: checkpoints
              mountPath: /checkpoints
            {{- end }}
            {{- if .root.Values.weights.existingClaim }}
            - name: weights
              mountPath: /weights
              readOnly: true
            {{- end }}
            {{- with .values.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        {{- include "gradwire.certsVolume" (dict "root" .root "role" .component) | nindent 8 }}
        - name: tmp
          emptyDir: {}
        - name: run
          {{- if .values.sharedMemoryHostPath }}
          hostPath:
            path: {{ .values.sharedMemoryHostPath }}
            type: Directory
          {{- else }}
          emptyDir:
            medium: Memory
          {{- end }}
        {{- if .root.Values.checkpoints.enabled }}
        - name: checkpoints
          persistentVolumeClaim:
            claimName: {{ include "gradwire.checkpointsClaim" .root }}
        {{- end }}
        {{- with .root.Values.weights.existingClaim }}
        - name: weights
          persistentVolumeClaim:
            claimName: {{ . }}
            readOnly: true
        {{- end }}
        {{- with .values.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- include "gradwire.disruptionBudget" . }}
{{- end -}}

{{/* (dict "root" $ "component" "stage" "values" .Values.stage) */}}
{{- define "gradwire.disruptionBudget" -}}
{{- if .values.disruptionBudget.enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "gradwire.fullname" .root }}-{{ .component }}
  labels:
    {{- include "gradwire.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .values.disruptionBudget.maxUnavailable }}
  # One that is broken keeps no node from being drained.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "gradwire.selector" . | nindent 6 }}
{{- end }}
{{- end -}}
