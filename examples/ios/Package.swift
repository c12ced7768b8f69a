// swift-tools-version: 5.9
// Not run in CI. A package around Bundle.swift; an app depends on it, or takes the one file.
import PackageDescription

let package = Package(
    name: "EdgetuneExample",
    platforms: [.iOS(.v16), .macOS(.v13)],
    products: [.library(name: "EdgetuneExample", targets: ["EdgetuneExample"])],
    dependencies: [
        .package(url: "https://github.com/microsoft/onnxruntime-swift-package-manager", from: "1.24.0")
    ],
    targets: [
        .target(
            name: "EdgetuneExample",
            dependencies: [.product(name: "onnxruntime", package: "onnxruntime-swift-package-manager")],
            path: ".",
            sources: ["Bundle.swift"]
        )
    ]
)
