{{/* The image's name, with its tag or digest. */}}
{{- define "flannel.image" -}}
{{- with .Values.flannel.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* off, on or strict; unquoted, YAML reads on and off as booleans. */}}
{{- define "flannel.networkPolicy" -}}
{{- $mode := .Values.flannel.networkPolicy -}}
{{- if kindIs "bool" $mode -}}{{ ternary "on" "off" $mode }}{{- else -}}{{ $mode }}{{- end -}}
{{- end -}}

{{/* Whether a new pod starts beside the old one and takes over its tunnel: yes, or nothing. */}}
{{- define "flannel.takeOver" -}}
{{- $f := .Values.flannel -}}
{{- $carries := or (eq $f.backend "udp") (and (eq $f.backend "wireguard") (ne ($f.userspace | default "auto") "never")) -}}
{{- if kindIs "bool" $f.takeOver -}}{{- if $f.takeOver -}}yes{{- end -}}{{- else if $carries -}}yes{{- end -}}
{{- end -}}

{{/* The keys of Backend, each as one line of JSON. */}}
{{- define "flannel.backend" -}}
{{- $f := .Values.flannel -}}
{{- $wireguard := eq $f.backend "wireguard" -}}
{{- $keys := list
  (list "VNI" $f.vni)
  (list (ternary "ListenPort" "Port" $wireguard) $f.backendPort)
  (list "ListenPortV6" $f.backendPortv6)
  (list "MTU" $f.mtu)
  (list "GBP" $f.GBP)
  (list "Learning" $f.learning)
  (list "DirectRouting" $f.directRouting)
  (list "ChecksumOffload" $f.checksumOffload)
  (list "CheckSources" $f.checkSources)
  (list "Fallback" $f.fallback)
  (list "Workers" $f.workers)
  (list "MacPrefix" $f.macPrefix)
  (list "PSK" $f.psk)
  (list "PersistentKeepaliveInterval" $f.keepaliveInterval)
  (list "Mode" $f.tunnelMode)
  (list "Userspace" $f.userspace) -}}
{{- $lines := list (printf "    \"Type\": %s" (toJson $f.backend)) -}}
{{- range $keys -}}
{{- $value := index . 1 -}}
{{- if not (kindIs "invalid" $value) -}}
{{- /* Numbers from values are floats, which would be written as 1e+06. */ -}}
{{- if kindIs "float64" $value -}}{{- $value = int64 $value -}}{{- end -}}
{{- $lines = append $lines (printf "    \"%s\": %s" (index . 0) (toJson $value)) -}}
{{- end -}}
{{- end -}}
{{- range $key, $value := $f.backendOptions -}}
{{- $lines = append $lines (printf "    %s: %s" (toJson $key) (toJson $value)) -}}
{{- end -}}
{{ join ",\n" $lines }}
{{- end -}}

{{/* net-conf.json */}}
{{- define "flannel.netConf" -}}
{{- $lines := list -}}
{{- if .Values.podCidr -}}
{{- $lines = append $lines (printf "  \"Network\": %s" (toJson .Values.podCidr)) -}}
{{- else -}}
{{- $lines = append $lines "  \"EnableIPv4\": false" -}}
{{- end -}}
{{- if .Values.podCidrv6 -}}
{{- $lines = append $lines "  \"EnableIPv6\": true" -}}
{{- $lines = append $lines (printf "  \"IPv6Network\": %s" (toJson .Values.podCidrv6)) -}}
{{- end -}}
{{- $lines = append $lines (printf "  \"EnableNFTables\": %t" .Values.flannel.enableNFTables) -}}
{{- if not (kindIs "invalid" .Values.flannel.fastPath) -}}
{{- $lines = append $lines (printf "  \"FastPath\": %t" .Values.flannel.fastPath) -}}
{{- end -}}
{{- range $key, $value := .Values.flannel.networkOptions -}}
{{- $lines = append $lines (printf "  %s: %s" (toJson $key) (toJson $value)) -}}
{{- end -}}
{{- $lines = append $lines (printf "  \"Backend\": {\n%s\n  }" (include "flannel.backend" .)) -}}
{
{{ join ",\n" $lines }}
}
{{- end -}}

{{/* What no schema shows: each refusal says what to do. */}}
{{- define "flannel.check" -}}
{{- $f := .Values.flannel -}}
{{- if and (empty .Values.podCidr) (empty .Values.podCidrv6) -}}
{{- fail "podCidr and podCidrv6 are both empty: set the pod network of the cluster, such as podCidr=10.244.0.0/16" -}}
{{- end -}}
{{- if and (eq $f.backend "ipip") .Values.podCidrv6 -}}
{{- fail "flannel.backend: ipip carries IPv4 alone: leave podCidrv6 empty, or use vxlan, host-gw, wireguard or udp" -}}
{{- end -}}
{{- $of := dict
  "backendPort" (list "vxlan" "udp" "wireguard")
  "mtu" (list "vxlan" "wireguard")
  "vni" (list "vxlan")
  "GBP" (list "vxlan")
  "learning" (list "vxlan")
  "directRouting" (list "vxlan" "ipip")
  "checksumOffload" (list "vxlan")
  "checkSources" (list "vxlan" "ipip" "udp")
  "fallback" (list "vxlan" "ipip")
  "workers" (list "udp" "wireguard")
  "macPrefix" (list "vxlan")
  "backendPortv6" (list "wireguard")
  "psk" (list "wireguard")
  "keepaliveInterval" (list "wireguard")
  "tunnelMode" (list "wireguard")
  "userspace" (list "wireguard") -}}
{{- range $key, $backends := $of -}}
{{- if and (not (kindIs "invalid" (index $f $key))) (not (has $f.backend $backends)) -}}
{{- fail (printf "flannel.%s has no effect with the backend %s: set it to null; it is for %s" $key $f.backend (join ", " $backends)) -}}
{{- end -}}
{{- end -}}
{{- if hasKey $f "flannel_cni" -}}
{{- fail "flannel.flannel_cni: the image of flannel.image contains the CNI plugin as well: remove it" -}}
{{- end -}}
{{- if (.Values.netpol | default dict).enabled -}}
{{- fail "netpol.enabled ran another program in Go flannel's chart; here flanneld enforces policies: set flannel.networkPolicy to on, and remove netpol" -}}
{{- end -}}
{{- $networkPolicy := include "flannel.networkPolicy" . -}}
{{- $kube := false -}}
{{- range concat $f.args $f.extraArgs -}}
{{- if regexMatch "^--?kube-subnet-mgr(=(1|t|T|true|TRUE|True))?$" . -}}{{- $kube = true -}}{{- end -}}
{{- if regexMatch "^--?(healthz-port|cni-conf|network-policy)(=|$)" . -}}
{{- fail (printf "flannel.args and flannel.extraArgs: %s is set by the chart: use flannel.healthz.port, flannel.skipCNIConfigInstallation or flannel.networkPolicy" .) -}}
{{- end -}}
{{- end -}}
{{- if and (ne $networkPolicy "off") (not $kube) -}}
{{- fail "flannel.networkPolicy needs --kube-subnet-mgr among flannel.args" -}}
{{- end -}}
{{- $rolling := ($f.updateStrategy | default dict).rollingUpdate | default dict -}}
{{- if and $rolling.maxSurge (ne (toString $rolling.maxSurge) "0") (not (include "flannel.takeOver" .)) -}}
{{- fail "flannel.updateStrategy.rollingUpdate.maxSurge: the new pod would need the port and the lock of the old one: set flannel.takeOver to true, or leave maxSurge out" -}}
{{- end -}}
{{- if and (eq (int $f.healthz.port) 0) (or .Values.monitoring.service .Values.monitoring.podMonitor) -}}
{{- fail "monitoring.service and monitoring.podMonitor need flannel.healthz.port: set it to another port than 0" -}}
{{- end -}}
{{- end -}}
