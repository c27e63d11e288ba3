{{/* The name of all objects: the release's. A Job's name becomes part of host names, so no dots, and a letter first. */}}
{{- define "elastic-pt.name" -}}
{{- $name := .Release.Name | replace "." "-" -}}
{{- if regexMatch "^[0-9]" $name }}{{ printf "run-%s" $name }}{{ else }}{{ $name }}{{ end -}}
{{- end -}}

{{/* Labels that select the pods of this run. */}}
{{- define "elastic-pt.labels" -}}
app.kubernetes.io/name: elastic-pt
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "elastic-pt.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "elastic-pt.name" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "elastic-pt.image" -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{- if .Values.image.digest }}{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else }}{{ .Values.image.repository }}:{{ $tag }}{{ end -}}
{{- end -}}

{{/* A list of one source, or of several, as the value of elastic.notices. */}}
{{- define "elastic-pt.notices" -}}
{{- if kindIs "string" .Values.notices }}{{ .Values.notices }}{{ else }}{{ .Values.notices | toJson }}{{ end -}}
{{- end -}}

{{/* The configuration as TOML. A JSON string, number, boolean or list of strings is one of TOML too. */}}
{{- define "elastic-pt.config" -}}
{{- if .Values.configToml -}}
{{ .Values.configToml }}
{{- else -}}
# The run, for all its pods. `elastic-pt config` prints every key with a sentence.
{{- range $section, $keys := .Values.config }}

[{{ $section }}]
{{- range $key, $value := $keys }}
{{ $key }} = {{ $value | toJson }}
{{- end }}
{{- end }}
{{ end -}}
{{- end -}}
