package accel

// Annotations and media types that converted images, layers and mappings carry.
const (
	// AnnotationSourceRepository: on a converted manifest or index, the source's
	// repository ("host/path").
	AnnotationSourceRepository = "dev.accel.source.repository"
	// AnnotationSourceDigest: on a converted manifest or index, the source
	// manifest's or index's digest. Its presence marks our own output.
	AnnotationSourceDigest = "dev.accel.source.digest"
	// AnnotationParams: on a converted manifest or index, the conversion
	// parameters' fingerprint.
	AnnotationParams = "dev.accel.params"
	// AnnotationLayerSource: on a layer descriptor, the original layer's digest.
	AnnotationLayerSource = "dev.accel.layer.source"
	// AnnotationTOCOffset: on a layer descriptor, the decimal byte offset of the
	// TOC's gzip member, which saves the footer request.
	AnnotationTOCOffset = "dev.accel.toc.offset"
	// AnnotationMapping: on a mapping artifact's manifest, the DSSE envelope as
	// JSON, so that a referrers listing alone delivers it.
	AnnotationMapping = "dev.accel.mapping"

	// MediaTypeMapping is a mapping artifact's artifactType and the DSSE
	// payload's type.
	MediaTypeMapping = "application/vnd.dev.accel.mapping.v1+json"
)
