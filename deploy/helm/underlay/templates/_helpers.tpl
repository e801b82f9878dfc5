{{/* One release, one set of agents: everything bears the release's name. */}}
{{- define "underlay.name" -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "underlay.selector" -}}
app.kubernetes.io/name: underlay
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "underlay.labels" -}}
{{ include "underlay.selector" . }}
app.kubernetes.io/component: node-agent
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "underlay.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What no schema can say: settings that do not go together. */}}
{{- define "underlay.check" -}}
{{- $v := .Values -}}
{{- if ne (empty $v.ec2.accessKeyId) (empty $v.ec2.secretAccessKey) -}}
{{- fail "ec2.accessKeyId and ec2.secretAccessKey go together: set both, or neither to use the node's role or the service account's" -}}
{{- end -}}
{{- if and (not (kindIs "invalid" $v.pool.warmPrefixTarget)) (not $v.prefixes) -}}
{{- fail "pool.warmPrefixTarget counts in prefixes: set prefixes to true, or use pool.warmIPTarget" -}}
{{- end -}}
{{- if and (or $v.metrics.podMonitor.enabled $v.metrics.serviceMonitor.enabled) (hasPrefix "127." $v.metrics.listen) -}}
{{- fail (printf "metrics.podMonitor and metrics.serviceMonitor need a port that Prometheus reaches, and metrics.listen is %s: set metrics.listen to 0.0.0.0:%s" $v.metrics.listen (last (splitList ":" $v.metrics.listen))) -}}
{{- end -}}
{{- if and $v.admissionPolicy.enabled (semverCompare "<1.30-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "admissionPolicy.enabled needs Kubernetes 1.30, and this is %s: set admissionPolicy.enabled to false; any node's agent may then change any Node" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end -}}
