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
	// AnnotationProfile: on a profile artifact's manifest, the encoded profile, gzipped and
	// in base64, where that is small; else the gzipped profile is the artifact's layer.
	AnnotationProfile = "dev.accel.profile"
	// AnnotationBundle: on a profile artifact's manifest, the description of the boot bundle that is among the artifact's
	// layers (package bundle).
	AnnotationBundle = "dev.accel.bundle"

	// MediaTypeMapping is a mapping artifact's artifactType and the DSSE
	// payload's type.
	MediaTypeMapping = "application/vnd.dev.accel.mapping.v1+json"
	// MediaTypeProfile is a profile artifact's artifactType, and an encoded profile's type.
	MediaTypeProfile = "application/vnd.dev.accel.profile.v1+json"
	// MediaTypeBundle is a boot bundle's type.
	MediaTypeBundle = "application/vnd.dev.accel.bundle.v1"
)
