#![allow(clippy::unwrap_used)]
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn top(bytes: &[u8], media_type: &str) -> Top {
    Top { media_type: media_type.to_owned(), digest: Digest::of(bytes), size: bytes.len() as u64 }
}

fn descriptor(number: usize, platform: Option<Value>) -> Value {
    let mut descriptor =
        json!({ "mediaType": OCI_MANIFEST, "digest": Digest::of(&[number as u8]).to_string(), "size": 1 });
    if let Some(platform) = platform {
        descriptor["platform"] = platform;
    }
    descriptor
}

fn selected(platforms: &[Option<Value>]) -> Result<Digest, StoreError> {
    let manifests: Vec<Value> =
        platforms.iter().cloned().enumerate().map(|(at, platform)| descriptor(at, platform)).collect();
    let bytes = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": manifests })).unwrap();
    match parse(&top(&bytes, OCI_INDEX), &bytes)? {
        Parsed::Index(index) => select("the index", &index).map(|top| top.digest),
        Parsed::Manifest(_) => panic!("not an index"),
    }
}

#[test]
fn this_platform_is_selected() {
    let platform = |os: &str, architecture: &str, variant: Option<&str>| {
        let mut platform = json!({ "os": os, "architecture": architecture });
        if let Some(variant) = variant {
            platform["variant"] = json!(variant);
        }
        Some(platform)
    };
    let number = |number: u8| Digest::of(&[number]);
    let arm = platform("linux", "arm64", Some("v8"));
    let amd64 = platform("linux", "amd64", None);
    let attestation = platform("unknown", "unknown", None);
    assert_eq!(selected(&[arm.clone(), attestation.clone(), amd64.clone()]).unwrap(), number(2));
    assert_eq!(
        selected(&[platform("linux", "amd64", Some("v3")), platform("linux", "amd64", Some("v1"))]).unwrap(),
        number(1)
    );
    assert_eq!(selected(&[platform("windows", "amd64", None), amd64]).unwrap(), number(1));
    assert_eq!(selected(&[None]).unwrap(), number(0));
    match selected(&[arm, attestation]) {
        Err(error @ StoreError::NoPlatform { .. }) => {
            assert!(error.to_string().contains("linux/arm64"), "{error}")
        }
        other => panic!("{other:?}"),
    }
    assert!(selected(&[]).is_err());
}

#[test]
fn documents_that_are_ambiguous_or_of_another_kind_are_refused() {
    let config = json!({ "mediaType": OCI_CONFIG, "digest": Digest::of(b"c").to_string(), "size": 1 });
    for (media_type, document) in [
        (OCI_MANIFEST, json!({ "schemaVersion": 2, "config": config, "layers": [], "manifests": [] })),
        (OCI_INDEX, json!({ "schemaVersion": 2, "config": config, "layers": [], "manifests": [] })),
        (OCI_MANIFEST, json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "config": config, "layers": [] })),
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", json!({ "schemaVersion": 1 })),
        ("", json!({ "schemaVersion": 1, "fsLayers": [] })),
        ("text/html", json!({})),
        (OCI_MANIFEST, json!([])),
        (
            OCI_MANIFEST,
            json!({ "schemaVersion": 2, "config": { "mediaType": OCI_CONFIG, "digest": "sha256:..", "size": 1 }, "layers": [] }),
        ),
    ] {
        let bytes = serde_json::to_vec(&document).unwrap();
        assert!(parse(&top(&bytes, media_type), &bytes).is_err(), "{document}");
    }
    let many: Vec<Value> = (0..=MAX_MANIFESTS_PER_INDEX).map(|number| descriptor(number, None)).collect();
    let bytes = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": many })).unwrap();
    assert!(parse(&top(&bytes, OCI_INDEX), &bytes).is_err());
}

fn read(layer_type: &str, layers: usize, diff_ids: usize, architecture: &str) -> Result<Image, StoreError> {
    let diff_ids = vec![Digest::of(b"t").to_string(); diff_ids];
    let config =
        json!({ "architecture": architecture, "os": "linux", "rootfs": { "type": "layers", "diff_ids": diff_ids } });
    let config = serde_json::to_vec(&config).unwrap();
    let layer = json!({ "mediaType": layer_type, "digest": Digest::of(b"l").to_string(), "size": 1 });
    let manifest = json!({
        "schemaVersion": 2, "layers": vec![layer; layers],
        "config": { "mediaType": DOCKER_CONFIG, "digest": Digest::of(&config).to_string(), "size": config.len() },
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    Image::read(&top(&manifest, DOCKER_MANIFEST), Vec::new(), |_, document| {
        Ok(match document {
            Document::Manifest => manifest.clone(),
            Document::Config => config.clone(),
        })
    })
}

#[test]
fn layers_are_checked() {
    for good in [
        OCI_LAYER,
        DOCKER_LAYER,
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
    ] {
        assert_eq!(read(good, 2, 2, "amd64").unwrap().layers.len(), 2);
    }
    for (foreign, hint) in [
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "foreign"),
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "decrypt"),
        ("text/plain", "tar layers"),
    ] {
        let error = read(foreign, 1, 1, "amd64").unwrap_err().to_string();
        assert!(error.contains(hint), "{error}");
    }
    assert!(read(OCI_LAYER, 2, 1, "amd64").is_err());
    assert!(read(OCI_LAYER, 501, 501, "amd64").is_err());
    assert!(matches!(read(OCI_LAYER, 1, 1, "arm64"), Err(StoreError::NoPlatform { .. })));
}

proptest! {
    #[test]
    fn any_json_is_read_or_refused(text in "\\{(\"(schemaVersion|manifests|layers|config|mediaType|digest|size)\":(1|2|-1|\"\"|\\[\\]|\\{\\}|null|1e99),?){0,6}\\}?", bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        for bytes in [text.as_bytes(), &bytes] {
            for media_type in ["", OCI_INDEX, OCI_MANIFEST] {
                if let Ok(Parsed::Index(index)) = parse(&top(bytes, media_type), bytes) {
                    let _ = select("", &index);
                }
            }
        }
    }
}
