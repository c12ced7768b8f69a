// Not run in CI. A library module around Bundle.kt; the versions of the plugins are those of your project.
plugins {
    id("com.android.library")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "dev.edgetune.example"
    compileSdk = 35
    defaultConfig {
        minSdk = 24 // of onnxruntime-android
        ndk { abiFilters += listOf("arm64-v8a") } // and armeabi-v7a for watches, with an int8-dynamic bundle
    }
    sourceSets["main"].kotlin.srcDir(".")
}

dependencies {
    implementation("com.microsoft.onnxruntime:onnxruntime-android:[1.24,2)")
}
