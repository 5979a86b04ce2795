{{- define "llm.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end }}
{{- define "llm.hosts" -}}
{{- $name := include "llm.name" . -}}
{{- $inside := list $name (printf "%s.%s" $name .Release.Namespace) (printf "%s.%s.svc" $name .Release.Namespace) (printf "%s.%s.svc.cluster.local" $name .Release.Namespace) -}}
{{- toJson (concat $inside (ternary (list .Values.ingress.host) (list) .Values.ingress.enabled) .Values.server.allowHosts) -}}
{{- end }}
{{- define "llm.match" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "llm.labels" -}}
{{ include "llm.match" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
{{- define "llm.jobBox" -}}
env:
  - {name: OMP_NUM_THREADS, value: {{ .Values.improve.threads | quote }}}
  - {name: HF_HUB_OFFLINE, value: "1"}
  - {name: HOME, value: /tmp}
resources: {{- toYaml .Values.improve.resources | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: run, mountPath: {{ .Values.improve.run }}}
{{- end }}
